//! Things that are known by a number, which is never given twice.

pub(super) struct Numbered<T>(Vec<Option<T>>);

impl<T> Default for Numbered<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T> Numbered<T> {
    pub(super) fn add(&mut self, thing: T) -> u32 {
        self.0.push(Some(thing));
        self.0.len() as u32 - 1
    }

    pub(super) fn get(&self, number: u32) -> Option<&T> {
        self.0.get(number as usize)?.as_ref()
    }

    pub(super) fn get_mut(&mut self, number: u32) -> Option<&mut T> {
        self.0.get_mut(number as usize)?.as_mut()
    }

    pub(super) fn remove(&mut self, number: u32) -> Option<T> {
        self.0.get_mut(number as usize)?.take()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        (0..).zip(&self.0).filter_map(|(number, thing)| Some((number, thing.as_ref()?)))
    }

    pub(super) fn things_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.0.iter_mut().flatten()
    }

    /// Takes all of them; their numbers stay taken.
    pub(super) fn clear(&mut self) -> impl Iterator<Item = T> {
        self.0.iter_mut().filter_map(Option::take)
    }
}
