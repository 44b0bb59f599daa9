"""Labels that the loss calls wrong: models that judge them, suggestions, and the page that shows these."""
