"""The same training in other libraries, written as their users write it."""
