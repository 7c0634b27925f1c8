//! A daemon is killed and started again while pages are elsewhere: they come, and are what they were.

mod support;

use dunlin_lab::harness::request;
use dunlin_lab::{Lab, Options};
use dunlin_proto::control::{MoveRequest, WaitFor};
use support::Workshop;
use support::obedient::Obedient;

/// Memory of several kinds, each with content that can be told again.
const MEMORY: &str = "import mmap as mm, gc
def block(seed, mib): return random.Random(seed).randbytes(1 << 20) * mib
def private(seed, mib):
    m = mm.mmap(-1, mib << 20, flags=mm.MAP_PRIVATE | mm.MAP_ANONYMOUS)
    m[:] = block(seed, mib)
    return m
def same(m, seed, mib): return hashlib.sha256(m[:mib << 20]).digest() == hashlib.sha256(block(seed, mib)).digest()
def zeros(m, start, length): return m[start:start + length] == bytes(length)
dropped, grown, kept = private(1, 48), private(2, 48), private(3, 48)
gone = [private(4 + i, 4) for i in range(8)]";

/// What the program does to its memory while its pages are elsewhere.
const CHANGES: [&str; 4] = [
    "dropped.madvise(mm.MADV_DONTNEED, 8 << 20, 16 << 20)",
    "grown.resize(96 << 20)",
    "[m.close() for m in gone[::2]]",
    "dropped.madvise(mm.MADV_DONTNEED, 40 << 20, 1 << 20)",
];

/// All of it, and what of it is not as it should be.
const CHECK: &str = "[name for name, good in [
    ('before the hole', dropped[:8 << 20] == block(1, 8)), ('the hole', zeros(dropped, 8 << 20, 16 << 20)),
    ('after the hole', dropped[24 << 20:40 << 20] == block(1, 16)), ('the second hole', zeros(dropped, 40 << 20, 1 << 20)),
    ('after that', dropped[41 << 20:] == block(1, 7)),
    ('grown', same(grown, 2, 48)), ('what it grew by', zeros(grown, 48 << 20, 48 << 20)), ('kept', same(kept, 3, 48)),
    ('the others', all(same(gone[i], 4 + i, 4) for i in range(1, 8, 2)))] if not good]";

fn on_one_line(text: &str) -> String {
    format!("exec({text:?})")
}

fn prepare(lab: &Lab, workshop: &Workshop, name: &str) -> Obedient {
    let (mut program, _) = Obedient::start(lab, workshop, name);
    program.ask(&on_one_line(MEMORY));
    program
}

fn resumed(lab: &Lab, program: &Obedient, to: &str) {
    let asked = MoveRequest {
        wait: WaitFor::Resumed,
        ..request(program.pid, to)
    };
    lab.move_as(asked).unwrap_or_else(|e| panic!("to {to}: {e:#?}"));
}

fn check(program: &mut Obedient, when: &str) {
    let answer = program.ask(&CHECK.replace('\n', " "));
    assert_eq!(answer, "[]", "{when}");
}

/// The destination's daemon is killed after each of the changes, or the holder's.
fn changes_survive(name: &str, killed: &str) {
    let lab = Lab::up(name, &Options::default());
    let workshop = Workshop::new(name);
    for kill_after in 0..=CHANGES.len() {
        let mut program = prepare(&lab, &workshop, &format!("program{kill_after}"));
        resumed(&lab, &program, "n2");
        let mut child = None;
        for (i, change) in CHANGES.into_iter().enumerate() {
            if i == kill_after {
                lab.signal_daemon(killed, 9);
                program.tell(change);
                lab.start_daemon(killed);
                program.answer();
            } else {
                program.ask(change);
            }
            if i == 1 {
                child = Some(program.fork(&format!("child{kill_after}")));
            }
        }
        if kill_after == CHANGES.len() {
            lab.signal_daemon(killed, 9);
            lab.start_daemon(killed);
        }
        let mut child = child.unwrap();
        for change in &CHANGES[2..] {
            child.ask(change);
        }
        check(
            &mut child,
            &format!("the child, {killed} killed before change {kill_after}"),
        );
        check(&mut program, &format!("{killed} killed before change {kill_after}"));
        let (pid, child) = (program.pid, child.pid);
        lab.until("all pages have come", |rows| {
            rows.iter()
                .filter(|row| row.pid == pid || row.pid == child)
                .all(|row| row.pages_elsewhere.is_empty())
        });
        lab.kill(child, 9);
        lab.kill(pid, 9);
    }
}

#[test]
fn changes_of_memory_survive_the_death_of_the_daemon_that_serves_it() {
    changes_survive("changes-there", "n2");
}

#[test]
fn changes_of_memory_survive_the_death_of_the_daemon_that_holds_it() {
    changes_survive("changes-here", "n1");
}
