"""The paper's own sizes: `./run.sh experiments NAME --paper`, and the numbers that it reports."""
