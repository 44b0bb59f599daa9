"""Commands that put several rooms together: train, eval and doctor. The others are in their rooms."""
