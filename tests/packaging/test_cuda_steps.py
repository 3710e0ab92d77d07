"""Counting a kernel's step in its machine code: loops by structure, ways by their branches."""

from __future__ import annotations

import re

import pytest

from tools import cuda_steps
from tools.cuda_steps import Counts

# A kernel as nvdisasm prints it, but for the encodings: a loop before the steps; a step that waits,
# spins behind the end where it has to, multiplies in a loop of its own and reads the sums.
SASS = """\
	.target	sm_90
.text._Z4stepv:
        .type           _Z4stepv,@function
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/                   FFMA R1, R1, R1, R1 ;
        /*0020*/               @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R2], R3 ;
        /*0040*/                   BSSY B0, `(.L_x_3) ;
        /*0050*/              @!P1 BRA `(.L_x_7) ;
.L_x_2:
        /*0060*/                   MOV R4, R5 ;
        /*0070*/                   BSYNC B0 ;
.L_x_3:
        /*0080*/                   BSSY.RECONVERGENT B0, `(.L_x_6) ;
        /*0090*/               @P2 BRA `(.L_x_5) ;
        /*00a0*/                   IADD3 R6, R6, 0x1, RZ ;
.L_x_4:
        /*00b0*/                   LDSM.16.M88.4 R8, [R6] ;
        /*00c0*/                   HMMA.16816.F32 R12, R8, R9, R12 ;
        /*00d0*/               @P3 BRA `(.L_x_4) ;
        /*00e0*/                   STS [R7], R12 ;
.L_x_5:
        /*00f0*/                   BSYNC.RECONVERGENT B0 ;
.L_x_6:
        /*0100*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0110*/                   SYNCS.ARRIVE.TRANS64 RZ, [R2], R13 ;
        /*0120*/                   FFMA R14, R13, R13, RZ ;
        /*0130*/               @P4 BRA `(.L_x_1) ;
        /*0140*/                   EXIT ;
.L_x_7:
        /*0150*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R2], R3 ;
        /*0160*/               @P1 BRA `(.L_x_2) ;
        /*0170*/                   BRA `(.L_x_7) ;
.L_x_8:
        /*0180*/                   BRA `(.L_x_8);
        /*0190*/                   NOP;
.text._Z5otherv:
        /*0000*/                   EXIT ;
"""


def counts_of(sass: str) -> Counts | None:
    return cuda_steps.count_step(cuda_steps.parse_functions(sass)["_Z4stepv"])


def test_functions():
    functions = cuda_steps.parse_functions(SASS)
    assert [(name, len(code)) for name, code in functions.items()] == [
        ("_Z4stepv", 26),
        ("_Z5otherv", 1),
    ]
    assert cuda_steps.count_step(functions["_Z5otherv"]) is None


def test_step_of_tensor_cores():
    """Not the loop before it, nor what follows the last step; but the spin, which comes back."""
    # From the last try: BRA MOV BSYNC BSSY BRA IADD3; to the barrier BRA and try of the spin too,
    # the product's four and the BSYNC behind it.
    assert counts_of(SASS) == Counts(total=20, to_product=6, to_barrier=13)


def test_step_without_tensor_cores():
    plain = re.sub(r"LDSM.*|HMMA.*", "FFMA R12, R8, R9, R12 ;", SASS)
    assert counts_of(plain) == counts_of(SASS)


def test_step_that_waits_for_nobody():
    """It begins behind the barrier of the step before."""
    alone = re.sub(r"SYNCS.*", "MOV R2, R3 ;", SASS)
    alone = alone.replace("FFMA R14, R13, R13, RZ", "BAR.SYNC.DEFER_BLOCKING 0x0")
    # Of the last barrier: BRA, MOV BSSY BRA, then MOV BSYNC BSSY BRA IADD3.
    assert counts_of(alone) == Counts(total=20, to_product=9, to_barrier=17)


@pytest.mark.parametrize("gone", ["BAR.SYNC.DEFER_BLOCKING 0x0", "@P4 BRA `(.L_x_1)"])
def test_no_step(gone):
    assert counts_of(SASS.replace(gone, "NOP")) is None


def test_the_innermost_loop_is_the_step():
    """Of two groups of lanes by turns, say, in each step."""
    turns = SASS.replace("/*0140*/", "/*0138*/ @P5 BRA `(.L_x_0) ;\n/*0140*/")
    assert counts_of(turns) == counts_of(SASS)


def test_a_longer_step_is_seen():
    longer = SASS.replace("IADD3 R6, R6, 0x1, RZ ;", "IADD3 R6, R6, 0x1, RZ ;\n/*00a8*/ NOP ;")
    assert counts_of(longer) == Counts(total=21, to_product=7, to_barrier=14)
    counted = {("step", "sm_90"): counts_of(longer)}
    limits = {("step", "sm_90"): counts_of(SASS)}
    assert cuda_steps.complaints(limits, limits) == []
    assert cuda_steps.complaints(counted, limits) == [
        "sm_90 step: to_barrier is 14 instructions, its limit is 13",
        "sm_90 step: to_product is 7 instructions, its limit is 6",
        "sm_90 step: total is 21 instructions, its limit is 20",
    ]


def test_limits_are_those_of_the_steps_that_there_are():
    a, b = (("step<Gru, Cores<half> >", sm) for sm in ("sm_80", "sm_90"))
    counts = Counts(2000, 20, 200)
    assert cuda_steps.complaints({a: counts}, {b: counts}) == [
        "sm_80 step<Gru, Cores<half> >: its step has no limits",
        "sm_90 step<Gru, Cores<half> >: it has limits, and no step",
    ]
    written = cuda_steps.write_limits({a: counts, b: counts})
    limits = cuda_steps.read_limits(written)
    assert limits == {a: Counts(2100, 21, 210), b: Counts(2100, 21, 210)}
    assert cuda_steps.LIMITS.read_text().startswith(cuda_steps.HEADER)
