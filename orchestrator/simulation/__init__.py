"""KV memory under traffic: paged allocation, and beside it preallocation as before PagedAttention. No torch, no GPU."""
