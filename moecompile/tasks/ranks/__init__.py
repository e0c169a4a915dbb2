"""What each rank of a launched task runs. Loading it takes seconds (Lightning, transformers), which its launcher does
not spend: so the ranks begin at once.
"""
