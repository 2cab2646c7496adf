"""The method of the paper, and what goes beyond it, as pure functions of arrays: nothing here knows of files or devices."""
