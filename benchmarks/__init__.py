"""Speed and memory of K-FAC steps, beside other libraries and beside what arithmetic allows."""
