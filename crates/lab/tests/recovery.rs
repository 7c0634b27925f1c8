//! A daemon is killed and started again, whatever its node was doing: everything goes on, once.

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

/// Which daemon is killed.
#[derive(Clone, Copy, PartialEq)]
enum Role {
    Source,
    Destination,
}

/// A move there and back, again and again, while a daemon is killed at every stage of it: there is one program, which
/// answers every order once.
fn killed_at_any_time(name: &str, role: Role) {
    let lab = Lab::up(name, &Options::default());
    let workshop = Workshop::new(name);
    let (mut program, _) = Obedient::start(&lab, &workshop, "program");
    program.ask("memory = random.Random(3).randbytes(1 << 20) * 24");
    program.ask("import threading");
    program.ask("turns = [0, 0]");
    for thread in 0..2 {
        program.ask(&format!(
            "exec('def turn():\\n while 1:\\n  turns[{thread}] += 1; time.sleep(0.001)', globals())"
        ));
        program.ask("threading.Thread(target=turn, daemon=True).start()");
    }
    let digest = program.ask("hashlib.sha256(memory).hexdigest()");
    let pid = program.pid;
    // From before the move to after it, whatever this machine is doing besides.
    let asked = std::time::Instant::now();
    resumed(&lab, &program, "n2");
    let whole_us = asked.elapsed().as_micros() as u64 + 10_000;
    let mut at = "n2".to_owned();
    let (mut moved, mut stayed) = (0, 0);
    for step in 0..30 {
        let delay_us = whole_us * step / 20;
        let to = if at == "n1" { "n2" } else { "n1" };
        let killed = if role == Role::Source { at.as_str() } else { to };
        std::thread::scope(|scope| {
            let number = pid.to_string();
            let lab = &lab;
            let moving = scope.spawn(move || lab.dunlin(&["--node", "n3", "move", &number, to, "--wait", "resumed"]));
            std::thread::sleep(std::time::Duration::from_micros(delay_us));
            lab.signal_daemon(killed, 9);
            lab.start_daemon(killed);
            moving.join().unwrap();
        });
        let when = format!("{killed} was killed {delay_us} us after a move from {at} to {to} was asked for");
        let mut found = Vec::new();
        lab.until(&format!("{pid} is in one place: {when}"), |rows| {
            found = rows.iter().filter(|r| r.pid == pid).map(|r| r.node.clone()).collect();
            found.len() == 1
        });
        assert_eq!(program.ask("hashlib.sha256(memory).hexdigest()"), digest, "{when}");
        assert_eq!(program.ask("turns.clear() or turns.extend([0, 0])"), "None", "{when}");
        while program.ask("all(turns)") != "True" {}
        // Two would answer twice.
        let answers = std::fs::read_to_string(workshop.path("program.answers")).unwrap();
        let orders = std::fs::read_to_string(workshop.path("program.orders")).unwrap();
        assert_eq!(answers.lines().count(), orders.lines().count(), "{when}");
        if found[0] == at {
            stayed += 1;
        } else {
            moved += 1;
        }
        at = found.remove(0);
    }
    println!("moved {moved} times, stayed {stayed} times");
    assert!(moved > 0 && stayed > 0, "the delays are not those of a move");
    let to = if at == "n1" { "n2" } else { "n1" };
    for to in [to, "n3"] {
        // Its number is free where it was when the last page has come from there.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while let Err(why) = lab.move_as(request(pid, to)) {
            assert!(std::time::Instant::now() < deadline, "moving on to {to}: {why:#?}");
        }
        assert_eq!(
            program.ask("hashlib.sha256(memory).hexdigest()"),
            digest,
            "moved on to {to}"
        );
    }
}

#[test]
fn a_source_killed_at_any_time_leaves_one_program() {
    killed_at_any_time("source-dies", Role::Source);
}

#[test]
fn a_destination_killed_at_any_time_leaves_one_program() {
    killed_at_any_time("destination-dies", Role::Destination);
}
