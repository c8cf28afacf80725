"""One file a family of torch functions: what they do with parameters."""
