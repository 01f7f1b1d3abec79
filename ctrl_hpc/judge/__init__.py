"""The critic as a service: critiques, the probability that a program is right, and which of two answers is."""
