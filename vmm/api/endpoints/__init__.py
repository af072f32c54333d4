"""The operations of the API: a table of rows per resource, which requests and the configuration file go through."""
