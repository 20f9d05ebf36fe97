"""The shared datastore: a log in Redis that servers write to and read from."""
