//! The family's dealings with its stores: asking for pages, and installing what arrives.

use super::claims::Probe;
use super::family::{Family, InHand, PAUSE, SHORTAGE};
use super::space::{Need, Outcome};
use super::store::{Arrival, Urgency};
use super::{Finish, SpaceId};
use dunlin_cluster::page_map::{PAGE, Want};
use dunlin_proto::ids::ImageId;
use dunlin_sys::pagemap;
use std::time::{Duration, Instant};

/// When so many pages have come on the faults connection, events are looked at again.
const PAGES_PER_TURN: u32 = 64;
/// The bulk is left lying for so long while a page is awaited on the faults connection.
pub(super) const STAND_BACK: Duration = Duration::from_micros(150);

impl Family {
    /// A thread of a space waits for a page: answers it, or asks for it and for what is likely to be next.
    pub(super) fn fault(&mut self, index: usize, page: u64) -> Outcome {
        let (image, source, asked) = match self.spaces[index].resolve(page) {
            Ok(Need::Nothing) => return Outcome::Done,
            Ok(Need::Page { image, source, asked }) => (image, source, asked),
            Ok(Need::Gone) => {
                self.finish(index, Finish::Gone);
                return Outcome::Gone;
            }
            Err(error) => {
                self.lose(index, &error);
                return Outcome::Gone;
            }
        };
        self.pace.fault(Instant::now());
        self.spaces[index].map.faulted(page);
        let Some(holder) = self.holders.get(&image).filter(|h| h.store.is_up()) else {
            return Outcome::Done;
        };
        if !asked || !holder.store.comes_soon(source) {
            self.ask_for(
                Want {
                    image,
                    source,
                    pages: 1,
                },
                Urgency::Now,
            );
        }
        if let Some(holder) = self.holders.get_mut(&image) {
            // Not only at the end of the turn: the program waits.
            holder.store.flush();
        }
        let (mut at, end) = (page + PAGE, self.spaces[index].read_ahead(page));
        while at < end {
            match self.spaces[index].map.ahead(at, (end - at) / PAGE) {
                Some(want) if want.image == image => self.ask_for(want, Urgency::Now),
                Some(_) | None => at += 64 * PAGE,
            }
        }
        Outcome::Done
    }

    fn ask_for(&mut self, want: Want, urgency: Urgency) {
        if let Some(holder) = self.holders.get_mut(&want.image) {
            holder.store.wanted(want, urgency);
        }
        for space in &mut self.spaces {
            space.map.set_asked(want, true);
        }
    }

    pub(super) fn take_arrivals(&mut self) {
        let now = Instant::now();
        for image in self.holders.keys().copied().collect::<Vec<_>>() {
            if let Some(holder) = self.holders.get_mut(&image) {
                holder.store.tick(now);
            }
            let mut pages = 0;
            while pages < PAGES_PER_TURN {
                let Some(arrival) = self.take(image, Urgency::Now) else {
                    break;
                };
                if let Arrival::Pages { present, .. } = &arrival {
                    pages += present.count_ones();
                }
                self.arrived(image, arrival);
            }
            // While something cannot be installed, more of the same would only pile up; and while a program waits,
            // the bulk stands back, but not for ever.
            if self.in_hand.is_empty() && !self.bulk_waits(image, now) {
                match self.take(image, Urgency::Later) {
                    Some(Arrival::Pages { want, present, data }) => {
                        self.install_in_steps(image, InHand { want, present, data });
                    }
                    Some(arrival) => self.arrived(image, arrival),
                    None => {}
                }
                self.pace.stepped();
            }
        }
    }

    /// Installs a piece of the bulk; between the steps, faults are read and answered.
    fn install_in_steps(&mut self, image: ImageId, piece: InHand) {
        let InHand { want, present, data } = piece;
        let mut bit = 0;
        while bit < 64 && want.pages >> bit != 0 {
            let step = self.pace.step_pages(Instant::now());
            if step == 64 && bit == 0 {
                return self.install(InHand { want, present, data });
            }
            let mask = (u64::MAX >> (64 - step)) << bit;
            let part = Want {
                pages: want.pages & mask,
                ..want
            };
            // Bits count from the first page, and so do the data: both stay as they are.
            let outcome = self.install_part(part, present, &data);
            bit += step;
            self.pace.stepped();
            if outcome == Outcome::Changing {
                // The rest, too, is decided after the events.
                return self.in_hand.push_back(InHand { want, present, data });
            }
            let spaces: Vec<SpaceId> = self.spaces.iter().map(|s| s.shared.id).collect();
            self.read_events(&spaces);
            while let Some(arrival) = self.take(image, Urgency::Now) {
                self.arrived(image, arrival);
            }
        }
        self.pool.give(data);
    }

    /// Is the bulk left lying this time?
    fn bulk_waits(&mut self, image: ImageId, now: Instant) -> bool {
        let Some(holder) = self.holders.get_mut(&image) else {
            return true;
        };
        if holder.store.is_urgent() {
            holder.bulk_waits_since.get_or_insert(now);
        }
        let waits = holder.stands_back(now).is_some();
        if !waits {
            holder.bulk_waits_since = None;
        }
        waits
    }

    fn take(&mut self, image: ImageId, urgency: Urgency) -> Option<Arrival> {
        self.holders.get_mut(&image)?.store.take(urgency, &mut self.pool)
    }

    fn arrived(&mut self, image: ImageId, arrival: Arrival) {
        match arrival {
            Arrival::Pages { want, present, data } => self.install(InHand { want, present, data }),
            Arrival::Known { from, to, present } => {
                for space in &mut self.spaces {
                    space.map.keep_only(image, from, to, &present);
                    space.recheck |= space.has_waiting();
                }
            }
            Arrival::Up => {
                if let Some(holder) = self.holders.get_mut(&image) {
                    holder.claimed = true;
                }
                let attached = self.holders.values().all(|h| h.claimed);
                if attached {
                    self.inherited = None;
                }
                for space in &self.spaces {
                    space
                        .shared
                        .update(|s| (s.attached, s.trouble) = (s.attached || attached, None));
                }
                self.ask_for_waiting();
            }
            Arrival::Down { asked, why } => {
                for space in &mut self.spaces {
                    asked.iter().for_each(|want| space.map.set_asked(*want, false));
                    space.shared.update(|s| s.trouble = Some(format!("{image:?}: {why}")));
                }
            }
            Arrival::Released => drop(self.holders.remove(&image)),
        }
    }

    /// Threads that wait since before a connection was there.
    fn ask_for_waiting(&mut self) {
        let waiting: Vec<(SpaceId, u64)> = self
            .spaces
            .iter()
            .flat_map(|s| s.waiting().map(|page| (s.shared.id, page)))
            .collect();
        for (id, page) in waiting {
            if let Some(index) = self.index_of(id) {
                self.fault(index, page);
            }
        }
    }

    fn install(&mut self, piece: InHand) {
        match self.install_part(piece.want, piece.present, &piece.data) {
            Outcome::Changing => self.in_hand.push_back(piece),
            Outcome::Done | Outcome::Short | Outcome::Gone => self.pool.give(piece.data),
        }
    }

    /// Installs the pages of `want` in every space; [`Outcome::Changing`] if some space wants it decided again.
    fn install_part(&mut self, want: Want, present: u64, data: &[u8]) -> Outcome {
        let mut again = false;
        for index in (0..self.spaces.len()).rev() {
            let watch = self.watch_probes(index, want, present);
            let outcome = self.spaces[index].install(want, present, data);
            self.look_at_probes(index, watch);
            match outcome {
                Ok(Outcome::Done) => {}
                Ok(Outcome::Changing) => again = true,
                Ok(Outcome::Short) => {
                    self.spaces[index].shared.update(|s| s.trouble = Some(SHORTAGE.into()));
                    std::thread::sleep(PAUSE);
                    again = true;
                }
                Ok(Outcome::Gone) => self.finish(index, Finish::Gone),
                Err(error) => self.lose(index, &error),
            }
        }
        if again { Outcome::Changing } else { Outcome::Done }
    }

    pub(super) fn retry(&mut self) {
        for _ in 0..self.in_hand.len() {
            // Changing spaces say why only in their events.
            self.read_events(&self.spaces.iter().map(|s| s.shared.id).collect::<Vec<_>>());
            if let Some(piece) = self.in_hand.pop_front() {
                self.install(piece);
            }
        }
    }

    /// Threads may wait for pages that turned out to be elsewhere no more.
    pub(super) fn recheck(&mut self) {
        for index in (0..self.spaces.len()).rev() {
            if !std::mem::take(&mut self.spaces[index].recheck) {
                continue;
            }
            let id = self.spaces[index].shared.id;
            let waiting: Vec<u64> = self.spaces[index].waiting().collect();
            for page in waiting {
                // Finding one gone shifts the others.
                if self.spaces.get(index).is_none_or(|s| s.shared.id != id) {
                    break;
                }
                let need = self.spaces[index].resolve(page);
                match need {
                    Ok(Need::Nothing | Need::Page { .. }) => {}
                    Ok(Need::Gone) => self.finish(index, Finish::Gone),
                    Err(error) => self.lose(index, &error),
                }
            }
        }
    }

    pub(super) fn ask(&mut self) {
        let narrow = self.pace.is_pressed(Instant::now());
        self.holders.values_mut().for_each(|holder| holder.store.narrow(narrow));
        for index in 0..self.spaces.len() {
            loop {
                let holders = &self.holders;
                let ready = |image| holders.get(&image).is_some_and(|h| h.store.has_room());
                let Some(want) = self.spaces[index].map.next(ready) else {
                    break;
                };
                self.ask_for(want, Urgency::Later);
            }
        }
        for holder in self.holders.values_mut() {
            holder.store.flush();
        }
    }

    /// A page that this space is about to get, if its process is not known and processes are sought: the page, and
    /// which of them lack it.
    fn watch_probes(&self, index: usize, want: Want, present: u64) -> Option<(u64, Vec<bool>)> {
        if self.probes.is_empty() || self.spaces[index].shared.status().pid.is_some() {
            return None;
        }
        let targets = self.spaces[index].map.targets(want);
        let target = targets.iter().find(|t| present >> t.bit & 1 == 1)?;
        Some((
            target.address,
            self.probes.iter().map(|p| !has_page(p, target.address)).collect(),
        ))
    }

    /// If the page is in one of them now, that is the one: this thread installs nothing else meanwhile. Another program
    /// could have made a page of its own at that very address and moment, so it must happen twice.
    fn look_at_probes(&mut self, index: usize, watch: Option<(u64, Vec<bool>)>) {
        let Some((address, lacked)) = watch else { return };
        let shared = self.spaces[index].shared.clone();
        let mut lacked = lacked.into_iter();
        let registry = &self.registry;
        self.probes.retain_mut(|probe| {
            if lacked.next() != Some(true) || !has_page(probe, address) {
                return true;
            }
            if probe.suspect.replace(shared.id) != Some(shared.id) {
                return true;
            }
            let found = registry.spaces().get(&shared.id).cloned();
            shared.update(|status| status.pid = Some(probe.pid));
            // Whoever asked may have lost patience; the space knows its process now all the same.
            let _ = found.map(|found| probe.answer.send(found));
            false
        });
    }
}

fn has_page(probe: &Probe, address: u64) -> bool {
    let entry = pagemap::entries(&probe.pagemap, address, 1)
        .ok()
        .and_then(|mut entries| entries.next());
    entry.is_some_and(pagemap::Entry::has_content)
}
