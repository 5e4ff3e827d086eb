"""The others that the benchmarks compare with, one runner each. Runners of peers import nothing of this project."""
