"""What `uncomp.kernels.compile` compiles."""

from uncomp.kernels.record.kernel import record_kernel
from uncomp.kernels.record.launch import DEFAULT
from uncomp.kernels.variant import Variant

VARIANTS = [
    Variant(
        f"record {dtype} {row}{' source' if source else ''}",
        record_kernel,
        {
            "rows_ptr": f"*{dtype}",
            "source_ptr": "*i64",
            "address_ptr": "*i64",
            "count_ptr": "*i64",
            "layer": "i32",
            "stride_row": "i32",
        },
        {"ROW": row, "HAS_SOURCE": source},
        DEFAULT,
    )
    for dtype, row, source in (("bf16", 4096, False), ("fp16", 576, True))
]
