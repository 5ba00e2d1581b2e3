"""Figures for people: tables and progress for the terminal."""
