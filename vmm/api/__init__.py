"""The REST API: HTTP, JSON, routes and the server on a UNIX socket."""
