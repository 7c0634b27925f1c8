use super::*;

const FILTER: Filter = Filter {
    cookie: 0x1122_3344_5566_7788,
    last_own_pid: 100,
    modulus: 64,
    residue: 3,
    ports: true,
};

/// Interprets the program as the kernel does; also tells whether anything but number and architecture was looked at.
fn run(arch: u32, nr: u32, args: [u64; 6]) -> (u32, bool) {
    run_of(FILTER, arch, nr, args)
}

fn run_of(filter: Filter, arch: u32, nr: u32, args: [u64; 6]) -> (u32, bool) {
    let program = filter.program();
    let mut data = [0u32; 16];
    data[0] = nr;
    data[1] = arch;
    for (i, arg) in args.iter().enumerate() {
        data[4 + 2 * i] = *arg as u32;
        data[5 + 2 * i] = (*arg >> 32) as u32;
    }
    let (mut a, mut x, mut pc, mut looked) = (0u32, 0u32, 0usize, false);
    loop {
        let i = program[pc];
        pc += 1;
        let branch = |yes: bool| if yes { i.jt as usize } else { i.jf as usize };
        match i.code {
            LOAD => {
                looked |= i.k > ARCH;
                a = data[i.k as usize / 4];
            }
            JUMP => pc += i.k as usize,
            JUMP_EQ => pc += branch(a == i.k),
            JUMP_GT => pc += branch(a > i.k),
            JUMP_GE => pc += branch(a >= i.k),
            SUB_X => a = a.wrapping_sub(x),
            MUL => a = a.wrapping_mul(i.k),
            DIV => a /= i.k,
            TAX => x = a,
            RETURN => return (i.k, looked),
            code => panic!("unknown instruction {code:#x}"),
        }
    }
}

fn wide(nr: i64, arg0: u64, arg5: u64) -> u32 {
    run(ARCH_X86_64, nr as u32, [arg0, 0, 0, 0, 0, arg5]).0
}

#[test]
fn clones_are_notified_unless_they_carry_the_cookie() {
    for (nr, narrow) in CLONES {
        assert_eq!(wide(nr, 0, 0), RET_NOTIFY);
        assert_eq!(wide(nr, 0, FILTER.cookie), RET_ALLOW);
        assert_eq!(wide(nr, 0, FILTER.cookie ^ 1), RET_NOTIFY);
        assert_eq!(wide(nr, 0, FILTER.cookie ^ (1 << 40)), RET_NOTIFY);
        assert_eq!(run(ARCH_I386, narrow, [0; 6]).0, RET_NOTIFY);
    }
}

#[test]
fn ports_are_notified_where_they_are_the_clusters() {
    let own = Filter { ports: false, ..FILTER };
    for nr in PORT_CALLS {
        assert_eq!(wide(nr, 3, 0), RET_NOTIFY);
        assert_eq!(wide(nr, 3, FILTER.cookie), RET_ALLOW);
        assert_eq!(run_of(own, ARCH_X86_64, nr as u32, [0; 6]), (RET_ALLOW, false));
    }
}

#[test]
fn only_foreign_pids_are_notified() {
    for (nr, narrow) in PID_CALLS {
        for (pid, action) in [
            (0i32, RET_ALLOW),
            (1, RET_ALLOW),
            (100, RET_ALLOW),
            (101, RET_NOTIFY),
            (131, RET_ALLOW),
            (132, RET_NOTIFY),
            (64 * 5000 + 3, RET_ALLOW),
            (64 * 5000 + 2, RET_NOTIFY),
            (i32::MAX, RET_NOTIFY),
            (-1, RET_ALLOW),
            (-132, RET_ALLOW),
            (i32::MIN, RET_ALLOW),
        ] {
            // The kernel looks at the low half only, so do we.
            for arg in [pid as u32 as u64, pid as i64 as u64, pid as u32 as u64 | 7 << 32] {
                assert_eq!(wide(nr, arg, 0), action, "call {nr} pid {pid}");
                assert_eq!(wide(nr, arg, FILTER.cookie), RET_ALLOW);
                assert_eq!(run(ARCH_I386, narrow, [arg, 0, 0, 0, 0, 0]).0, action);
            }
        }
    }
}

#[test]
fn everything_else_is_decided_by_its_number_alone() {
    let listed = |n: u32| {
        let tasks = CLONES.iter().chain(&PID_CALLS).map(|(nr, _)| *nr);
        tasks.chain(PORT_CALLS).any(|nr| nr as u32 == n) || n == IO_URING_SETUP
    };
    for nr in (0..600).filter(|n| !listed(*n)) {
        assert_eq!(run(ARCH_X86_64, nr, [132; 6]), (RET_ALLOW, false), "call {nr}");
    }
    assert_eq!(run(ARCH_X86_64, IO_URING_SETUP, [0; 6]), (RET_EPERM, false));
    assert_eq!(run(ARCH_I386, IO_URING_SETUP, [0; 6]), (RET_EPERM, false));
    assert_eq!(run(ARCH_X86_64, u32::MAX, [0; 6]), (RET_ALLOW, false));
    assert_eq!(run(ARCH_X86_64, 0x4000_0000 + 56, [0; 6]).0, RET_ENOSYS);
    assert_eq!(run(0x1234, 0, [0; 6]).0, RET_ENOSYS);
}

#[test]
fn numbers_of_both_entries_are_understood() {
    assert!(is_clone(ARCH_X86_64, 56) && is_clone(ARCH_I386, 120) && !is_clone(ARCH_I386, 56));
    assert_eq!(wide_number(ARCH_I386, 37), libc::SYS_kill);
    assert_eq!(wide_number(ARCH_X86_64, 434), libc::SYS_pidfd_open);
}
