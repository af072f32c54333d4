"""Clients in other languages, with their own HTTP: what people drive microVMs with."""
