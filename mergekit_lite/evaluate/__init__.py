"""How good a merged model is, by a program of the user's that prints a number."""
