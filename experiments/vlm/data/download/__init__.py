"""From an address to bytes, politely, for training (data/fetch) and data preparation alike.

client      one address: redirects, limits, retries; why it failed
hosts       how often and how widely one host may be asked
addresses   which addresses may be connected to
"""
