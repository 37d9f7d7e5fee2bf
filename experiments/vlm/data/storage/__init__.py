"""From an address to bytes, politely, for training (data/fetch) and data preparation alike.

client      one address: redirects, limits, retries; why it failed
hosts       which addresses may be connected to, and how often and how widely one host may be asked
"""
