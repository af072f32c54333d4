"""The microVM metadata service: content (store), session tokens, and an HTTP front without I/O."""
