"""What a recipe can name: passes with `plan` and `apply`."""
