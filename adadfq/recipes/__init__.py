"""The shipped recipes, one JSON file each; see :class:`adadfq.recipe.Recipe` for the fields."""
