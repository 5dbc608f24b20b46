"""Answer files, their scores, and what is reckoned from them."""
