"""Descriptions of links that belong to no accelerator."""
