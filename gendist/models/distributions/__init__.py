"""Distributions that mixtures, naive Bayes and the emissions of hidden Markov models are made of."""
