"""Everything that a machine with a GPU can show, in the order in which it is waited for."""
