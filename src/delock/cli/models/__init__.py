"""Makes the models and the data that a command line names and that are not Delock's own: other libraries' and the user's."""
