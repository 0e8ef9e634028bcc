"""The quant types that this project adds, by name."""

from __future__ import annotations

from mbq_gguf.formats import mbq3, mbq3s

OWN = {quant_type.name: quant_type for quant_type in (mbq3.MBQ3, mbq3.MBQ3_64, mbq3s.MBQ3S, mbq3s.MBQ3S_64)}
