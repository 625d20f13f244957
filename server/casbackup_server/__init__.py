"""The chunk server: repositories over HTTP. ``casbackup serve`` starts it; ``app.create_app`` is its application."""
