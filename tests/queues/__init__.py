"""Tests of the queue server: its stores, its broker and what they are made of."""
