"""One module per format change, frozen once released: a step copies the old structures that it needs."""
