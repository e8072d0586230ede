#include "textflag.h"

#define SYS_exit 60
#define SYS_clone3 435
#define CLONE_ARGS_SIZE 88
#define CALL_SIZE 64

// Results above this are errors, negated.
#define MAX_ERRNO 0xfffffffffffff001

// func forkRun(clone *cloneArgs, calls *call, n uintptr, key *[2]uint64) (pid, errno uintptr)
//
// The key is passed to clone3 where it would have a third and a fourth argument.
// The child shares our memory and, as its parent sleeps until it has executed a
// program or ended, our stack. It uses none of it: registers hold all it needs.
TEXT ·forkRun(SB), NOSPLIT, $0-48
	MOVQ clone+0(FP), DI
	MOVQ calls+8(FP), R12
	MOVQ n+16(FP), R13
	MOVQ key+24(FP), R8
	MOVQ 0(R8), DX
	MOVQ 8(R8), R10
	MOVQ $CLONE_ARGS_SIZE, SI
	MOVQ $SYS_clone3, AX
	SYSCALL
	CMPQ AX, $MAX_ERRNO
	JCC  failed
	TESTQ AX, AX
	JZ   child
	MOVQ AX, pid+32(FP)
	MOVQ $0, errno+40(FP)
	RET

failed:
	NEGQ AX
	MOVQ $0, pid+32(FP)
	MOVQ AX, errno+40(FP)
	RET

child:
	TESTQ R13, R13
	JZ    end
	MOVQ  0(R12), AX
	MOVQ  8(R12), DI
	MOVQ  16(R12), SI
	MOVQ  24(R12), DX
	MOVQ  32(R12), R10
	MOVQ  40(R12), R8
	MOVQ  48(R12), R9
	SYSCALL
	CMPQ  AX, $MAX_ERRNO
	JCC   fault
	ADDQ  $CALL_SIZE, R12
	DECQ  R13
	JMP   child

fault:
	NEGQ AX
	MOVQ AX, 56(R12) // the parent reads it

end:
	MOVQ $127, DI
	MOVQ $SYS_exit, AX
	SYSCALL
	INT  $3
