"""``cellblock check``: can this host run jailed microVMs?"""
