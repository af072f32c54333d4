"""The controller's side of every other cell: commands and replies, processes, life cycles, exits."""
