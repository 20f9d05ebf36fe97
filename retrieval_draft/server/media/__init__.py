"""Images and sounds in chat messages: where they may come from, and the model inputs that they become."""
