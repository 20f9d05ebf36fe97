"""HTTP/1.1 plumbing that the server and the drafting service share."""
