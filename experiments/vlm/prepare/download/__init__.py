"""From a URL to bytes on disk, politely, at most once.

hosts       how often and how widely one host may be asked
fetch       one URL: redirects, limits, retries
journal     what arrived and what failed, on disk, so that nothing is fetched twice
"""
