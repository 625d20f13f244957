"""Reserved for the chunk server, which serves repositories over HTTP. This release holds no server."""
