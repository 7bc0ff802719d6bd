"""Paths and defaults that all tests share."""


