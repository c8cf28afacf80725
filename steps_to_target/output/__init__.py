"""What a comparison is shown as: terminal, JSON, CSV, pictures, page."""
