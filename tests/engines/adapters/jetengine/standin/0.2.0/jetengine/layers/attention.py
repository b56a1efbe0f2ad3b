from jetengine_shared import attend_over_pages as flash_attn_with_kvcache

__all__ = ["flash_attn_with_kvcache"]
