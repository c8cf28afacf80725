"""The curvature of one parameter or group of parameters: collected, averaged, inverted."""
