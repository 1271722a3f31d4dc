"""Side by side with peers, in one run; results are kept as JSON with the machine that made them."""
