"""Bytes from elsewhere, for training and data preparation alike.

outages     storage that is away is waited for; what is not there, or damaged, is a reject
remote      files of other machines, opened in one way
file_cache  local copies of what is remote, packed or drawn, bounded in size
unpack      a packed file to one that can seek, and what can be had of a damaged one
fetch       an image of a training record by its address, by way of the cache
client      one address, politely: redirects, limits, retries; why it failed
hosts       which addresses may be connected to, and how often and how widely one host may be asked
"""
