"""What a forward pass does with parameters, and how its rows share them."""
