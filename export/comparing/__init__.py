"""Comparing the files of any runs: which rows, in which order and columns; and one page that holds them all."""
