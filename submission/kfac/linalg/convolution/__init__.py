"""Second moments and sums of the patches of a convolution, without forming the patches."""
