"""Every call of the API, once: keyword arguments to a request, an answer to a plain value."""
